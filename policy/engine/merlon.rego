# Decides a call by the grants in data.merlon and by the policy's own Rego in
# data.authz and data.envoy.authz. It is part of every policy bundle, so that
# any OPA which loads one can answer data.merlon.decision:
#
#   {"allow": bool, "reason": string, "rule_id": string, "dry_run": [grant ID]}
#
# The input has the shape of opa-envoy-plugin, and optionally "protocol"
# (http, grpc or tcp), which the enforcement point sets. What the data means
# is said in policy/grant, whose plain matcher is tested to agree.
#
# policy/engine checks identity and path by itself, looks the leaves of the
# index up, and enters with the call in input.merlon: at granted where there is
# no own Rego, else at verdict, and at dry_run. decision enters there too, after
# it has found the same in Rego. No function takes the call as an argument: OPA
# would look it up in a cache each time.
package merlon

decision := refusal("NO_IDENTITY") if {
	source == ""
} else := refusal("BAD_REQUEST") if {
	ambiguous
} else := decided if {
	decided := answer with input.merlon as {
		"deny": live("deny"),
		"allow": live("allow"),
		"dry_run": live("dry_run"),
		"path": path,
		"method": method,
	}
}

refusal(reason) := {"allow": false, "reason": reason, "rule_id": "", "dry_run": []}

answer := {
	"allow": reason == "ALLOWED",
	"reason": reason,
	"rule_id": rule_id,
	"dry_run": dry_run,
} if {
	[reason, rule_id] := verdict
}

# input.merlon has the grants for the call's source, destination and protocol
# that have not expired (deny, allow and dry_run, each in the order of their
# IDs), and its path and method (null where there is none).
#
# The order says what wins: deny over allow over the default, which denies;
# among denials by default the nearest miss.
verdict := ["DENY_RULE", denying[0]] if {
	input.merlon.deny
} else := ["ERROR", "rego:deny"] if {
	malformed_deny
} else := ["DENY_RULE", "rego:deny"] if {
	rego_denies
} else := ["ERROR", "rego:allow"] if {
	malformed_allow
} else := ["ALLOWED", allowing[0]] if {
	input.merlon.allow
} else := ["ALLOWED", "rego:allow"] if {
	rego_allows
} else := [nearest_miss, ""]

# response is the object that own Rego answers with, if it says the same as
# verdict: it goes with a call that is allowed or with a denial by default.
default response := null

response := data.authz.allow if {
	agrees(data.authz.allow)
} else := data.envoy.authz.allow if {
	agrees(data.envoy.authz.allow)
}

agrees(answer) if {
	answer.allowed == true
	verdict[0] == "ALLOWED"
}

agrees(answer) if {
	answer.allowed == false
	verdict == [nearest_miss, ""]
}

# granted is verdict without own Rego.
granted := ["DENY_RULE", denying[0]] if {
	input.merlon.deny
} else := ["ALLOWED", allowing[0]] if {
	input.merlon.allow
} else := [nearest_miss, ""]

denying := [grant.id | some grant in input.merlon.deny; path_fits(grant); method_fits(grant)]

allowing := [grant.id | some grant in input.merlon.allow; path_fits(grant); method_fits(grant)]

nearest_miss := "METHOD" if {
	some grant in input.merlon.allow
	path_fits(grant)
} else := "PATH" if {
	input.merlon.allow[0]
} else := "NO_GRANT"

dry_run := sort({grant.id | some grant in input.merlon.dry_run; path_fits(grant); method_fits(grant)})

method_fits(grant) if grant.methods[input.merlon.method]

method_fits(grant) if not grant.methods

path_fits(grant) if grant.exact[input.merlon.path]

path_fits(grant) if {
	some prefix in grant.below
	startswith(input.merlon.path, prefix)
	input.merlon.path != prefix
}

path_fits(grant) if {
	grant.any
	input.merlon.path != null
}

path_fits(grant) if {
	some template in grant.templates
	parts := split(input.merlon.path, "/")
	length_fits(template, parts)
	every pair in template.fixed { parts[pair[0]] == pair[1] }
	every i in template.free { parts[i] != "" }
}

length_fits(template, parts) if {
	not template.more
	count(parts) == template.parts
}

length_fits(template, parts) if {
	template.more
	parts[template.parts] != ""
}

# What the call is.

default source := ""

source := input.attributes.source.principal if is_string(input.attributes.source.principal)

default destination := ""

destination := input.attributes.destination.principal if is_string(input.attributes.destination.principal)

http := input.attributes.request.http

default protocol := "tcp"

protocol := input.protocol if {
	input.protocol
} else := "http" if {
	http
}

# The query is no part of the path.
request_path := split(http.path, "?")[0] if {
	contains(http.path, "?")
} else := http.path

rpc := parts if {
	parts := split(request_path, "/")
	count(parts) == 3
	parts[0] == ""
	parts[1] != ""
	parts[2] != ""
}

default path := null

# As servers decode it. In a query "+" would be a space.
path := urlquery.decode(replace(request_path, "+", "%2B")) if protocol == "http"

path := rpc[1] if protocol == "grpc"

path := "" if protocol == "tcp"

default method := null

method := http.method if protocol == "http"

method := rpc[2] if protocol == "grpc"

# Ambiguous paths: servers decode and clean them after the decision. The same
# rules as policy.CheckPath.
ambiguous if {
	protocol in {"http", "grpc"}
	not plain_path
}

plain_path if {
	regex.match(`^/(?:[^/\\;%#?\x00-\x1f\x7f-\x{9f}]+/)*(?:[^/\\;%#?\x00-\x1f\x7f-\x{9f}]+)?$`, unescaped)
	not dot_segment
}

# unescaped replaces each acceptable percent-encoding by a letter: ASCII that
# is neither a control character, "/", "\", "%" nor unreserved, and UTF-8.
unescaped := request_path if {
	not contains(request_path, "%")
} else := regex.replace(request_path, `%(?:2[0-46-9a-cA-C]|3[a-fA-F]|40|5[bdeBDE]|60|7[b-dB-D]|[cC]2%[abAB][0-9a-fA-F]|(?:[cC][3-9a-fA-F]|[dD][0-9a-fA-F])%[89abAB][0-9a-fA-F]|[eE]0%[abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[eE][1-9a-cA-CefEF]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[eE][dD]%[89][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF]0%[9abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF][1-3]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[fF]4%8[0-9a-fA-F]%[89abAB][0-9a-fA-F]%[89abAB][0-9a-fA-F])`, "x")

dot_segment if {
	contains(request_path, "/.")
	regex.match(`/\.\.?(?:/|$)`, request_path)
}

# The grants for this source, destination and protocol.

leaves := [leaf |
	some to in candidates(destination, data.merlon.depths.to)
	some from in candidates(source, data.merlon.depths.from)
	leaf := data.merlon.index[to][from][protocol]
]

# live has the grants of one kind in leaves that have not expired, by ID.
live(kind) := [pair[1] | some pair in sort({[grant.id, grant] | some leaf in leaves; some grant in leaf[kind]; not expired(grant)})]

expired(grant) if time.now_ns() >= grant.expires_ns

# candidates lists the index keys that an ID can stand under: itself, its
# trust domain, any, and "…/*" for each depth at which there are such patterns.
candidates(id, depths) := array.concat([id, trust_domain, "*"], below) if {
	parts := split(id, "/")
	trust_domain := concat("/", array.slice(parts, 0, 3))
	below := [concat("/", array.concat(array.slice(parts, 0, depth), ["*"])) |
		some depth in depths
		depth < count(parts)
	]
}

# The policy's own Rego. Anything but a boolean (for allow also the object of
# opa-envoy-plugin with a boolean "allowed") is an error, which denies.

rego_denies if same(data.authz.deny, true)

rego_denies if same(data.envoy.authz.deny, true)

malformed_deny if not_boolean(data.authz.deny)

malformed_deny if not_boolean(data.envoy.authz.deny)

rego_allows if same(data.authz.allow, true)

rego_allows if same(data.envoy.authz.allow, true)

rego_allows if allowed(data.authz.allow)

rego_allows if allowed(data.envoy.authz.allow)

malformed_allow if unclear(data.authz.allow)

malformed_allow if unclear(data.envoy.authz.allow)

# These take any type, so that a policy whose answer is no boolean compiles,
# and is found out when it answers.
not_boolean(answer) if not is_boolean(answer)

same(a, b) if a == b

allowed(answer) if answer.allowed == true

unclear(answer) if not clear(answer)

clear(answer) if is_boolean(answer)

clear(answer) if is_boolean(answer.allowed)
