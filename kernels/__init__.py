"""What can be computed: score expressions, attention specs, kernels and the operators that run them."""
