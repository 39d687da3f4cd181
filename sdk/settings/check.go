// Whether a table of settings and its configuration fit each other: for the tests of
// programs.

package settings

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
)

// Check says which settings have no field, or none that is read from text, which have
// no usage, and which fields of C have no setting, but for those in fileOnly, which
// only the file has.
func (p *Program[C]) Check(fileOnly ...string) error {
	var errs []error
	var c C
	v := reflect.ValueOf(&c).Elem()
	keys := make(map[string]bool)
	for _, s := range p.Settings {
		keys[s.Key] = true
		if s.Usage == "" && !s.Secret {
			errs = append(errs, fmt.Errorf("%s: has no usage", s.Key))
		}
		if s.Set == nil {
			errs = append(errs, check(v, s.Key))
		}
	}
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag.Get("yaml")
		if tag != "-" && keys[tag] == slices.Contains(fileOnly, tag) {
			errs = append(errs, fmt.Errorf("%s: is to be a setting, or in the file alone", tag))
		}
	}
	return errors.Join(errs...)
}

// check fills the field of key: what has no way to be filled panics.
func check(c reflect.Value, key string) (err error) {
	field := fieldOf(c, key)
	if !field.IsValid() {
		return fmt.Errorf("%s: is no field", key)
	}
	defer func() {
		if problem := recover(); problem != nil {
			err = fmt.Errorf("%s: %v", key, problem)
		}
	}()
	_ = fill(field.Addr().Interface(), "") // what nothing is made of does not matter
	return nil
}
