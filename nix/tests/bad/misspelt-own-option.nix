# role: gateway
# expect: The option `mvm.gateway.healthSecond' does not exist
# expect: healthSeconds
{
  mvm.gateway.healthSecond = 10;
}
