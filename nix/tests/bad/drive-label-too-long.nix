# role: worker
# expect: A definition for the option `mvm.drives.models.label' is not of type `string matching the pattern [A-Za-z0-9_-]{1,16}'.
{
  mvm.drives.models.label = "seventeen-letters";
}
