"""The message on a checkpoint that contains Python code of its own. Free of torch.

Such code runs only with `remote_code: true` in the run file. A loader takes the permission as its parameter
`remote_code`; a `Workspace` and a loaded `Policy` have it as a field.
"""

OWN_CODE = "it contains code of its own; read it, and if you trust it set `remote_code: true` in the run file"
