"""What the server answers, how fast, in how much memory and for how long, beside servers written by hand."""
