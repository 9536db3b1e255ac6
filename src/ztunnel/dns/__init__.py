"""The DNS proxy: answers what the mesh owns, and hands everything else on as it came.

```text
15053 ─► wire (question) ─► answer (pure: names, store) ─► wire (reply)
                   └ not ours ─► forward ─► the host's resolver ─► the same bytes back
```

`names` and `answer` decide and need neither sockets nor dnspython; the SOCKS5 port asks them too. `server`, which
brings dnspython, is imported only where the proxy is on.
"""
