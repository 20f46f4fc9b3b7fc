"""What tests the paper itself: its claims, its precision, and the bound of Figure 5."""
