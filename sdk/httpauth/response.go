// What a policy has sent beside its decision: header fields to and fro, and how a
// denial looks.

package httpauth

import (
	"encoding/json"
	"maps"
	"net/http"

	"merlon.dev/policy"
)

// Problem is the body of a denial, application/problem+json, unless the policy has
// a body of its own.
type Problem struct {
	Type       string        `json:"type"`
	Title      string        `json:"title"`
	Status     int           `json:"status"`
	Reason     policy.Reason `json:"reason"`
	DecisionID string        `json:"decision_id"`
	Hint       string        `json:"hint,omitempty"`
}

const problemContentType = "application/problem+json"

// asDecided gives r as next is to see it: with the policy's fields in the place of
// the caller's of the same names, and without those that it takes away. It copies
// what it changes.
func asDecided(r *http.Request, send *policy.Response) *http.Request {
	if send == nil || len(send.Headers)+len(send.RemoveHeaders) == 0 {
		return r
	}
	changed := *r
	changed.Header = r.Header.Clone()
	maps.DeleteFunc(changed.Header, func(name string, _ []string) bool { return send.Replaces(name) })
	addFields(changed.Header, send.Headers)
	return &changed
}

func addFields(to http.Header, fields []policy.HeaderField) {
	for _, f := range fields {
		to.Add(f.Name, f.Value)
	}
}

// refuse answers with the denial: the policy's own answer, where it has one.
func refuse(w http.ResponseWriter, r *http.Request, d policy.Decision) {
	p := Problem{
		Type:       ProblemType,
		Title:      "The call is denied",
		Status:     d.DenialStatus(),
		Reason:     d.Reason,
		DecisionID: d.DecisionID.String(),
		Hint:       d.Hint(),
	}
	if d.Reason == policy.BadRequest {
		p.Title = "The request is ambiguous"
	}
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Type", problemContentType)
	body := ""
	if send := d.Response; send != nil {
		if body = send.Body; body != "" {
			header.Set("Content-Type", "text/plain; charset=utf-8")
		}
		replaceFields(header, send.Headers, body == "")
	}
	header.Set(DecisionIDHeader, p.DecisionID)
	w.WriteHeader(p.Status)
	if r.Method == http.MethodHead || p.Status == http.StatusNoContent || p.Status == http.StatusNotModified {
		return
	}
	var err error
	if body != "" {
		_, err = w.Write([]byte(body))
	} else {
		err = json.NewEncoder(w).Encode(p)
	}
	if err != nil {
		panic(http.ErrAbortHandler) // the caller has gone; end the connection quietly
	}
}

// replaceFields puts fields in the place of those of the same names; what type the
// problem document has it does not say.
func replaceFields(header http.Header, fields []policy.HeaderField, problem bool) {
	for _, f := range fields {
		if f.Name != "content-type" || !problem {
			header.Del(f.Name)
		}
	}
	for _, f := range fields {
		if f.Name != "content-type" || !problem {
			header.Add(f.Name, f.Value)
		}
	}
}
