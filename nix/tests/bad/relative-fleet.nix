# role: host
# expect: A definition for the option `mvm.host.fleetFile' is not of type `null or string matching the pattern /.*'.
{
  mvm.host.fleetFile = "fleet.toml";
}
