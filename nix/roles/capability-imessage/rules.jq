# Nothing but the tenant's own network, in and out. Gets $config (a list of one document, or of null).

def tenant:
  $config[0].network.address // empty
  | if test("^[0-9]{1,3}(\\.[0-9]{1,3}){3}/[0-9]{1,2}$") then . else error("config.json: network.address is not an address with a prefix") end;

[ "table inet mvm_isolated",
  "delete table inet mvm_isolated",
  "table inet mvm_isolated {",
  "  chain input {",
  "    type filter hook input priority filter; policy drop;",
  "    iifname \"lo\" accept",
  (tenant | "    ip saddr \(.) accept"),
  "  }",
  "  chain output {",
  "    type filter hook output priority filter; policy drop;",
  "    oifname \"lo\" accept",
  (tenant | "    ip daddr \(.) accept"),
  "  }",
  "}"
] | .[]
