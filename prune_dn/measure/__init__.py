"""What a net costs: parameters, MACs, latency."""
