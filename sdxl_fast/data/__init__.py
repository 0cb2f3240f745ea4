"""Data sets: the embedded pipeline's emoji pictures, and what feeds the trainers."""
