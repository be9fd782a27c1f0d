"""What has nothing to do with pruning: data loaders, processes, files, random positions, snapshots, timing, checks."""
