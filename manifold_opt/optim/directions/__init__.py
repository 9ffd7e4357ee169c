"""From a gradient to a direction."""
