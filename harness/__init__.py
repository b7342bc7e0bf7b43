"""What the scripts share as programs: models on disk, several processes, runs that can be resumed, reports."""
