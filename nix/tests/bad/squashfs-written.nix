# role: worker
# expect: mvm: drive models: a squashfs file system cannot be written; set readOnly
{
  mvm.drives.models = {
    fsType = "squashfs";
    readOnly = false;
  };
}
