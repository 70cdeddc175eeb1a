# role: host
# expect: mvm.host: fleet and fleetFile are both set, and there is one fleet
{
  mvm.host.fleetFile = "/etc/mvm/fleet.toml";
}
