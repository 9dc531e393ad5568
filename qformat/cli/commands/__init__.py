"""The commands: one file each, under its name and its heading in the help. No command imports another one."""
