# role: worker
# expect: mvm: role worker, profile minimal: the manifest's services name wrok.service, and the image has no such unit
{
  mvm.services = [
    {
      unit = "wrok.service";
      secrets = [ "token" ];
    }
  ];
}
