"""Race: find the best recipe for a task."""
