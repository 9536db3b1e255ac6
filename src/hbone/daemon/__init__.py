"""What a long-running process needs around the protocol: logs, private files, an HTTP server for its own pages.

Shared by the daemons that are built on this library; the library itself does not import it.
"""
