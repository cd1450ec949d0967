"""The machine check behind `lumina-engine doctor` and the Doctor screen. No torch in this process: what needs it is probed in
another one."""
