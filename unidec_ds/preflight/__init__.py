"""What a run will take, known before it starts: memory, disk, FLOPs, traffic, and time."""
