# role: worker
# expect: mvm: role worker, profile minimal: networking.useDHCP or networking.useNetworkd is set
{
  networking.useDHCP = true;
}
