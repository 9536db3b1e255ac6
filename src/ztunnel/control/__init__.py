"""What a ztunnel asks of the control plane: a certificate, and what the mesh looks like."""
