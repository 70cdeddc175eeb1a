# The gateway's packet filter rules. Gets $config, $gateway (lists of one document, or of null) and $may: the ports that
# the role may expose, or null for any.

def refuse(why): error("gateway.json: " + why);

# The tenant's network, written as the gateway's own address with its prefix, which nft cuts.
def tenant:
  $config[0].network.address // empty
  | if test("^[0-9]{1,3}(\\.[0-9]{1,3}){3}/[0-9]{1,2}$") then . else error("config.json: network.address is not an address with a prefix") end;

def allowed:
  $gateway[0]
  | if . == null then []
    elif type != "object" then refuse("not an object")
    elif .version != 1 then refuse("version is \(.version), and only 1 is known")
    else .allow // []
    end
  | if type != "array" then refuse("allow is not a list") else .[] end
  | if type != "object" then refuse("\(tojson) is not { protocol, port }")
    elif (.protocol | IN("tcp", "udp") | not) then refuse("protocol \(.protocol | tojson) is neither tcp nor udp")
    elif (.port | type) != "number" or .port != (.port | floor) or .port < 1 or .port > 65535 then
      refuse("port \(.port | tojson) is not from 1 to 65535")
    elif $may != null and (. as $wanted | any($may[]; .port == $wanted.port and .protocol == $wanted.protocol) | not) then
      refuse("the role may not expose \(.protocol) port \(.port)")
    else "\(.protocol) dport \(.port) accept"
    end;

[ "table inet mvm_gateway",
  "delete table inet mvm_gateway",
  "table inet mvm_gateway {",
  "  chain input {",
  "    type filter hook input priority filter; policy drop;",
  "    ct state established,related accept",
  "    iifname \"lo\" accept",
  "    ip protocol icmp accept",
  (tenant | "    ip saddr \(.) accept"),
  (allowed | "    \(.)"),
  "  }",
  "  chain forward {",
  "    type filter hook forward priority filter; policy drop;",
  "    ct state established,related accept",
  (tenant | "    ip saddr \(.) accept"),
  "  }",
  "}"
] | .[]
