"""What tests of HBONE programs need: certificates of every kind, joined ends, frame builders, hosts."""
