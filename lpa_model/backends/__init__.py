"""How an LPA model is computed: the only code that names a device, a dtype or an instruction set."""
