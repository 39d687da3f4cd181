// What a policy has sent beside its decision: header fields to and fro, and how a
// denial looks.

package httpauth

import (
	"maps"
	"net/http"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

// Problem is the body of a denial, application/problem+json, unless the policy has
// a body of its own.
type Problem = denial.Problem

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
	a := denial.HTTP(d)
	header := w.Header()
	for _, f := range a.Fields {
		header.Del(f.Name)
	}
	addFields(header, a.Fields)
	w.WriteHeader(a.Status)
	if r.Method == http.MethodHead || a.Status == http.StatusNoContent || a.Status == http.StatusNotModified {
		return
	}
	if _, err := w.Write([]byte(a.Body)); err != nil {
		panic(http.ErrAbortHandler) // the caller has gone; end the connection quietly
	}
}
