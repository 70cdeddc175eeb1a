# role: gateway
# expect: A definition for the option `mvm.gateway.healthSeconds' is not of type `integer between 5 and 3600'.
{
  mvm.gateway.healthSeconds = 1;
}
