"""What makes a script a program: policies on disk, several processes, runs that survive, reports. Imports `common`."""
