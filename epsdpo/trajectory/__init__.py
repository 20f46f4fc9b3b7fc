"""What a β record shows: tables of it, the pairs behind a step, and runs side by side."""
