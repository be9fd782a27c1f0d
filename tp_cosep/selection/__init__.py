"""From statistics to the channels of a group that are kept."""
