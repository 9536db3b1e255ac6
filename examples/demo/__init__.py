"""`make demo`: a whole mesh on this host, with real traffic, shown and checked."""
