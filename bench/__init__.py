"""Measures our proxies beside others: same machine, same run, taking turns."""
