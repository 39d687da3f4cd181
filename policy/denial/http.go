// Package denial decides how a refused call is told to its caller: as an HTTP
// answer with a problem document, or as a gRPC status with a google.rpc.ErrorInfo.
// Whatever enforces (SDK, sidecar, an Envoy that asks the agent) tells it alike.
package denial

import (
	"encoding/json"

	"merlon.dev/policy"
)

// ProblemType is the type of the problem document (RFC 9457) that tells of a
// denial.
const ProblemType = "https://merlon.dev/problems/denied"

// ProblemContentType is that of the document.
const ProblemContentType = "application/problem+json"

// DecisionIDHeader carries the decision ID of a denial, in lower case.
const DecisionIDHeader = "x-decision-id"

// Problem is the body of a denial, of type ProblemContentType, unless the policy has
// a body of its own.
type Problem struct {
	Type       string        `json:"type"`
	Title      string        `json:"title"`
	Status     int           `json:"status"`
	Reason     policy.Reason `json:"reason"`
	DecisionID string        `json:"decision_id"`
	Hint       string        `json:"hint,omitempty"`
}

// Answer is an HTTP answer. Names of Fields are in lower case, each is to take the
// place of what was there; of one name there may be several.
type Answer struct {
	Status int
	Fields []policy.HeaderField
	Body   string
}

// HTTP is the answer to a request that d denies: the policy's own, where it has one.
func HTTP(d policy.Decision) Answer {
	a := Answer{Status: d.DenialStatus()}
	own := []policy.HeaderField{
		{Name: "cache-control", Value: "no-store"},
		{Name: "x-content-type-options", Value: "nosniff"},
		{Name: "content-type", Value: ProblemContentType},
	}
	var sent []policy.HeaderField
	if d.Response != nil {
		a.Body, sent = d.Response.Body, d.Response.Headers
	}
	if a.Body == "" {
		a.Body = problem(d, a.Status)
		sent = without(sent, "content-type") // what type the problem document has the policy does not say
	} else {
		own[2].Value = "text/plain; charset=utf-8"
	}
	for _, f := range own {
		if len(without(sent, f.Name)) == len(sent) {
			a.Fields = append(a.Fields, f)
		}
	}
	a.Fields = append(append(a.Fields, sent...), policy.HeaderField{Name: DecisionIDHeader, Value: d.DecisionID.String()})
	return a
}

func problem(d policy.Decision, status int) string {
	p := Problem{
		Type: ProblemType, Title: "The call is denied", Status: status,
		Reason: d.Reason, DecisionID: d.DecisionID.String(), Hint: d.Hint(),
	}
	if d.Reason == policy.BadRequest {
		p.Title = "The request is ambiguous"
	}
	text, err := json.Marshal(p)
	if err != nil {
		return "" // not reached: strings and a number
	}
	return string(text) + "\n"
}

// without gives fields without those of a name. It copies only where it must.
func without(fields []policy.HeaderField, name string) []policy.HeaderField {
	for i, f := range fields {
		if f.Name == name {
			return append(fields[:i:i], without(fields[i+1:], name)...)
		}
	}
	return fields
}
