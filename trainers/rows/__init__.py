"""Files of users to rows: any container, any known format, every fault by its line. Without torch."""
