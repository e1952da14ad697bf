"""Fast forms of the places where metric learning spends its time; a file a kernel, plain tensors in and out."""
