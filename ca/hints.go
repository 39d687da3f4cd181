// What to do next about an error of merlon-ca.

package ca

import (
	"errors"
	"flag"
	"strings"

	"merlon.dev/ca/internal/opening"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/settings"
)

// Hint says in a few words what the reader of err can do next, if that is
// known.
func Hint(err error) string {
	if hint := settings.Hint(err); hint != "" {
		return hint
	}
	if hint := opening.Hint(err); hint != "" {
		return hint
	}
	if hint := partHint(err); hint != "" {
		return hint
	}
	switch text := err.Error(); {
	case errors.Is(err, flag.ErrHelp):
		return ""
	case strings.Contains(text, "trust_domain: is missing"):
		return "merlon-ca -trust-domain example.org, or trust_domain in the file of -config"
	case strings.Contains(text, "address already in use"):
		return "another process has the port: choose another with -address, -https-address or -health-address"
	case strings.Contains(text, "another process listens there"):
		return "another merlon-ca runs here: stop it, or choose another socket with -admin-socket"
	case strings.Contains(text, "permission denied"), strings.Contains(text, "make data_dir"):
		return "choose folders this user can write: -data-dir and -admin-socket"
	}
	return ""
}

// partHint is Hint for errors that the CA's parts name.
func partHint(err error) string {
	const create = "merlon token create --kind replica --name NAME"
	for _, known := range []struct {
		is   error
		hint string
	}{
		{upstream.ErrNoKeys, "to add a replica, run `" + create + "` on the CA that holds the root key and set join_address, join_token_file and root_hash; to be that CA itself, put the keys folder of the CA that it is from, and the kek beside it, into data_dir"},
		{upstream.ErrIsReplica, "set join_address to the CA that holds the root key; on a nested CA set upstream: merlon, and upstream_address"},
		{upstream.ErrIsRootHolder, "remove join_address, or upstream: merlon, or use another data_dir for the replica or nested CA"},
		{upstream.ErrEnded, rejoin},
		{upstream.ErrOtherReplica, "set replica_name to the name that the keys have, or leave it out; a name is for good"},
		{seal.ErrNoKey, "put it back to where it was, or say where it is with key_file, key_credential or key_passphrase_file; without it the keys are lost, and only a backup of both helps"},
		{seal.ErrWrongKey, "set key_file, key_credential or key_passphrase_file to the one they were sealed under; after `merlon key reseal` was interrupted, run it again. If all of that is right the file is damaged: restore data_dir/keys from a backup"},
		{seal.ErrBroken, "restore the file from a backup of data_dir/keys; nothing was changed"},
		{upstream.ErrNoKMS, "set kms to where the key is"},
		{upstream.ErrUpstreamNotBuilt, "build merlon-ca as the message says, from the source of the same version"},
		{upstream.ErrUpstreamAnswer, "change the template, role or policy by which the upstream authority signs: ca/README.md, Upstream authorities, has one that works"},
		{upstream.ErrUpstreamAway, "see that the upstream authority runs, and that upstream_address and the credentials are right; it is asked each minute once the CA has an intermediate"},
		{upstream.ErrOtherUpstream, "set upstream and upstream_root_file as they were; a CA under another root begins with a new data_dir"},
		{upstream.ErrKMSNotBuilt, "build merlon-ca as the message says, from the source of the same version"},
		{upstream.ErrKeysInUse, "stop the merlon-ca that runs on this data_dir"},
		{upstream.ErrRootEnded, "nobody trusts anything under it any more: on the CA with the root key, start once with -new-root, then give every agent and replica a new token and root_hash (merlon token create)"},
		{errEvicted, rejoin},
		{errOtherHolder, "stop one of the two; a further replica joins with keys of its own (merlon token create --kind replica)"},
		{store.ErrReplaced, "start merlon-ca again, and so every other replica: it opens the store that is there now"},
		{trust.ErrOtherRoot, "a store is of no use without its keys: put the keys folder of the CA that it is from, and the kek beside it, into data_dir; replicas share one store, at the same etcd_endpoints and etcd_prefix"},
		{trust.ErrWithdrawn, "this is an old copy of data_dir/keys: bring back the newest, which has the root that signs now (merlon authority list on a replica, or the audit log, names it)"},
		{errNoJoinToken, "run `" + create + "` (for a nested CA --kind nested-ca) on the CA that holds the root key, then set join_token_file and root_hash"},
		{errJoinOther, "let join_address, or upstream_address, be the CA that holds the root key, and replica_name the name that the token was made for, or leave replica_name out"},
		{errJoinRefused, "a token works once and for a short time: run `" + create + "` (for a nested CA --kind nested-ca) again"},
		{errNested, "set upstream: merlon and upstream_address on a nested CA, and on no other; what it is, it is for good"},
	} {
		if errors.Is(err, known.is) {
			return known.hint
		}
	}
	return ""
}

// rejoin is how a replica comes back that is none any more.
const rejoin = "to come back: `merlon replica evict NAME` on another replica, move data_dir/keys away here, and join with a new token (merlon token create --kind replica, or nested-ca)"
