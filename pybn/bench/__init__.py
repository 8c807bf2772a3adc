"""`pybn bench`: pybn against a memory copy and against everyone else who does batch norm on the CPU."""
