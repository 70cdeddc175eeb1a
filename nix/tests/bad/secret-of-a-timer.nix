# role: gateway
# expect: mvm: role gateway, profile minimal: the manifest gives mvm-gateway-health.timer secrets, and only a service can need them
{
  mvm.services = [
    {
      unit = "mvm-gateway-health.timer";
      secrets = [ "token" ];
    }
  ];
}
