"""What a run is: weights, gradients and moments, on a device or in host memory, and what updates them."""
