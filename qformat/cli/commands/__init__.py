"""The commands: one file each, under its name. No command imports another one."""
