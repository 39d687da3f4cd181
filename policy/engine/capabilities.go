package engine

// This file decides which built-in functions a policy may call. It is a list
// of what is allowed, so that a new version of OPA adds nothing by itself.
// Left out on purpose (attack T30): all that reaches outside (http.send, the
// network, the process's environment), that is random, that reads unverified
// tokens, that parses or runs further code, and that can take long or much
// memory for short arguments (bits.lsh of 40 million takes 20 s that nothing can
// interrupt, and a caller may have named the number). time.now_ns stays: it is the time of the
// decision, and one decision sees one time.

import (
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
)

const allowedBuiltins = `
abs array.concat array.flatten array.reverse array.slice assign
base64.decode base64.encode base64.is_valid base64url.decode base64url.encode base64url.encode_no_pad
bits.and bits.negate bits.or bits.rsh bits.xor
ceil concat contains count
crypto.hmac.equal crypto.hmac.sha256 crypto.hmac.sha512 crypto.sha256
div endswith eq equal floor format_int glob.match glob.quote_meta
graph.reachable graph.reachable_paths gt gte hex.decode hex.encode indexof indexof_n
internal.member_2 internal.member_3 internal.print internal.template_string internal.test_case
intersection is_array is_boolean is_null is_number is_object is_set is_string
json.filter json.is_valid json.marshal json.patch json.remove json.unmarshal
lower lt lte max min minus mul neq
net.cidr_contains net.cidr_contains_matches net.cidr_intersects net.cidr_is_valid
numbers.range numbers.range_step
object.filter object.get object.keys object.remove object.subset object.union object.union_n or and plus
print product regex.find_all_string_submatch_n regex.find_n regex.is_valid regex.match regex.replace regex.split
rego.metadata.chain rego.metadata.rule
rem replace round semver.compare semver.is_valid sort split sprintf startswith
strings.any_prefix_match strings.any_suffix_match strings.count strings.replace_n strings.reverse strings.split_n
substring sum
time.add_date time.clock time.date time.diff time.format time.now_ns time.parse_duration_ns time.parse_ns
time.parse_rfc3339_ns time.weekday
to_number trim trim_left trim_prefix trim_right trim_space trim_suffix type_name
union units.parse units.parse_bytes upper uri.is_valid uri.parse
urlquery.decode urlquery.decode_object urlquery.encode urlquery.encode_object walk`

// builtins splits OPA's built-in functions into allowed and refused names.
var builtins = sync.OnceValue(func() (b struct {
	caps    *ast.Capabilities
	refused map[string]bool
},
) {
	allowed := map[string]bool{}
	for name := range strings.FieldsSeq(allowedBuiltins) {
		allowed[name] = true
	}
	b.caps, b.refused = ast.CapabilitiesForThisVersion(), map[string]bool{}
	var keep []*ast.Builtin
	for _, f := range b.caps.Builtins {
		if allowed[f.Name] {
			keep = append(keep, f)
		} else {
			b.refused[f.Name] = true
		}
	}
	b.caps.Builtins = keep
	b.caps.AllowNet = []string{} // also no schema is ever fetched
	return b
})

// Capabilities is what OPA may do for a Merlon policy.
func Capabilities() *ast.Capabilities { return builtins().caps }

// refusal says why the built-in function name is not allowed, and what to use
// in its place; empty if it is allowed or no built-in function.
func refusal(name string) string {
	if !builtins().refused[name] {
		return ""
	}
	switch {
	case name == "io.jwt.decode":
		return "io.jwt.decode reads unverified tokens; input.jwt has the claims of the call's JWT-SVID, verified"
	case strings.HasPrefix(name, "io.jwt."):
		return name + " is not available: a policy holds no keys; input.jwt has the claims of the call's JWT-SVID, verified"
	case name == "http.send", strings.HasPrefix(name, "net."):
		return name + " is not available: decisions do not wait for a network; put what they need into the policy"
	case name == "opa.runtime":
		return "opa.runtime is not available: it shows the process's environment"
	case name == "rand.intn", strings.HasPrefix(name, "uuid."):
		return name + " is not available: the same call gets the same decision"
	case name == "trace":
		return "trace is not available; use print, which shows in merlon policy test"
	}
	return name + " is not available in policies"
}
