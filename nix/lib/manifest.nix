# Reads mvm-profiles.toml at the root of a flake, and refuses what is wrong in it by name.
#
#   readManifest ./.  =>  { profiles.<name> = { module = <path>; };
#                           roles.<name>    = { module = <path>; services = [ … ]; ports = null or [ … ]; … }; }
#
# mvm reads the same file by itself: requires_*, priority, min_running* and vsock_handlers are its affair and are only
# checked here, so that a mistake is found by whichever looks first.
{ lib }:
root:
let
  file = "mvm-profiles.toml";
  refuse = object: why: throw "${file}: ${object}: ${why}";

  manifest =
    if builtins.pathExists (root + "/${file}") then
      builtins.fromTOML (builtins.readFile (root + "/${file}"))
    else
      throw "${file}: there is none at the root of the flake (${toString root})";

  names = set: lib.concatStringsSep ", " (builtins.attrNames set);

  # Each kind of value: what it is called, and whether a value is one.
  kinds = {
    module = {
      called = "a path below the flake's root, such as \"roles/web.nix\"";
      is = v: builtins.isString v && builtins.match "[^/].*" v != null && builtins.match "(.*/)?\\.\\.(/.*)?" v == null;
    };
    bool = {
      called = "true or false";
      is = builtins.isBool;
    };
    priority = {
      called = "a number from 0 to 1000";
      is = v: builtins.isInt v && v >= 0 && v <= 1000;
    };
    count = {
      called = "a number from 0 on";
      is = v: builtins.isInt v && v >= 0;
    };
    ports = {
      called = "a list of { port = 1..65535, protocol = \"tcp\" (or left out) or \"udp\" }";
      is = v: builtins.isList v && builtins.all isPort v;
    };
    services = {
      called = "a list of systemd units with their ending, or of { unit, secrets = [\"…\"] }: [\"web.service\"]";
      is = v: builtins.isList v && builtins.all (s: isUnit s || isService s) v;
    };
    handlers = {
      called = "a list of exec, shell, copy, logs";
      is = v: builtins.isList v && builtins.all (h: builtins.elem h [ "exec" "shell" "copy" "logs" ]) v;
    };
  };
  only = allowed: set: removeAttrs set allowed == { };
  isPort =
    v:
    builtins.isAttrs v
    && only [ "port" "protocol" ] v
    && builtins.isInt (v.port or null)
    && v.port >= 1
    && v.port <= 65535
    && builtins.elem (v.protocol or "tcp") [ "tcp" "udp" ];
  isUnit = v: builtins.isString v && builtins.match "[A-Za-z0-9:_.@-]+\\.(service|socket|target|timer|path)" v != null;
  isSecret = v: builtins.isString v && builtins.match "[A-Za-z0-9_-][A-Za-z0-9_.-]*" v != null;
  isService =
    v:
    builtins.isAttrs v
    && only [ "unit" "secrets" ] v
    && isUnit (v.unit or null)
    && builtins.isList (v.secrets or [ ])
    && builtins.all isSecret (v.secrets or [ ]);

  profileKeys = {
    module = kinds.module;
  };
  roleKeys = {
    module = kinds.module;
    requires_config_drive = kinds.bool;
    requires_secrets_drive = kinds.bool;
    priority = kinds.priority;
    min_running = kinds.count;
    min_running_seconds = kinds.count;
    ports = kinds.ports;
    services = kinds.services;
    vsock_handlers = kinds.handlers;
  };

  # Checks one table, and returns it with `module` as a path that exists.
  entry =
    kind: keys: name: table:
    let
      object = "${kind} ${name}";
      check =
        key: value:
        if !(keys ? ${key}) then
          refuse object "unknown key ${key}; there are ${names keys}"
        else if !(keys.${key}.is value) then
          refuse object "${key} is not ${keys.${key}.called}"
        else
          value;
      checked = lib.mapAttrs check table;
      module = root + "/${checked.module}";
    in
    # The name becomes part of an attribute, a unit and a host name.
    if builtins.match "[a-z]([a-z0-9-]{0,30}[a-z0-9])?" name == null then
      refuse object "a name is 1 to 32 small letters, digits and hyphens, begins with a letter and does not end with a hyphen"
    else if !builtins.isAttrs table then
      refuse object "not a table"
    else if !(table ? module) then
      refuse object "module is missing"
    else if !builtins.pathExists module then
      refuse object "there is no ${checked.module} in the flake"
    else
      builtins.deepSeq checked (
        checked
        // {
          inherit module;
        }
        // lib.optionalAttrs (checked ? services) {
          services = map (s: if builtins.isString s then { unit = s; } else s) checked.services;
        }
        // lib.optionalAttrs (checked ? ports) { ports = map (port: { protocol = "tcp"; } // port) checked.ports; }
      );

  entries = kind: keys: tables: lib.mapAttrs (entry kind keys) tables;

  version = manifest.meta.version or (refuse "meta" "version is missing");
  unknown = removeAttrs manifest [ "meta" "profiles" "roles" ];
in
if version != 1 then
  refuse "meta" "version is ${toString version}, and only 1 is known"
else if unknown != { } then
  refuse "top level" "unknown table ${names unknown}; there are meta, profiles, roles"
else
  {
    profiles = entries "profile" profileKeys (manifest.profiles or { });
    roles = entries "role" roleKeys (manifest.roles or { });
  }
