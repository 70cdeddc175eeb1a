# role: worker
# expect: mvm: drive data: the label mvm-data is the agent's, which mounts it at /data
# expect: mvm: drive data: /data is taken
{
  mvm.drives.data = { };
}
