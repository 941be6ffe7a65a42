"""prune_dn: channel pruning for DenseNets."""
