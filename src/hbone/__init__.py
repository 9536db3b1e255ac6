"""HBONE: many TCP connections in one mutual-TLS HTTP/2 connection between two SPIFFE identities."""
