"""Every byte of every connection: listeners, tunnels, relays, on one epoll."""
