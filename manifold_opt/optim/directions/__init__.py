"""Update directions computed from gradients."""
