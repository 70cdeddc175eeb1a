# role: builder
# expect: mvm: drive job: the label mvm-job is also that of other
{
  mvm.drives.other.label = "mvm-job";
}
