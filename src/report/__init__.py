"""Reports: what several runs came to, side by side."""
