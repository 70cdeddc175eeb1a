# role: worker
# expect: A definition for the option `environment.systemPackages.[]' is not of type `package'.
{
  environment.systemPackages = [ "jq" ];
}
